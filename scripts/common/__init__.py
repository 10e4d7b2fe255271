"""What several programs share, whatever they do."""
