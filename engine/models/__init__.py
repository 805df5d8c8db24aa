"""Model families, their dropout and compilation, and models as Hugging Face folders."""
