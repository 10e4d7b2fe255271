"""Measuring time and memory of DoRA beside LoRA; results/ holds what was measured."""
