"""Evaluation of our models and Hugging Face's on tasks of the lm-eval harness; an interrupted one resumes."""
