"""The tasks in sentences, for pretrained models: words, templates, contexts, and the published file."""
