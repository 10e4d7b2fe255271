"""What is computed: functions on tensors, which know no modules."""
