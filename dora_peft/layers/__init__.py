"""What an adapted layer holds: state and life cycle of each kind of layer."""
