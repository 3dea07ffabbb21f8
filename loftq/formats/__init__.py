"""Bytes and names: how checkpoints, backbones and adapters lie on disk. No mathematics."""
