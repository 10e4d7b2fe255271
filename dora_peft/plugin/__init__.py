"""Where PEFT, transformers and accelerate are touched."""
