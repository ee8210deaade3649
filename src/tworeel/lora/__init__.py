"""The adapter: injection through peft, LoRA files in the forms that others read, conversion between them."""
