"""Tasks of the lm-eval harness for our own models and Hugging Face's: scores, their data, and what is done already."""
