"""What transformers and peft call things."""
