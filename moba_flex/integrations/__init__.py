"""Integrations with other libraries; all modules here need transformers."""
