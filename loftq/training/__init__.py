"""From the artifact to a fine-tuned model, on transformers' Trainer, peft and accelerate."""
