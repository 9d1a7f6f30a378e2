"""The Hugging Face Hub: downloads, uploads, and the check for private text before an upload."""
