"""The interface to transformers and peft: names, tasks, modules, loading."""
