"""Trains, evaluates and runs models with adapters, on top of transformers' Trainer, peft and accelerate."""
