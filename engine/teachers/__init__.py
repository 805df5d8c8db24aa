"""What is learnt from: frozen teachers, and the cache of their hidden states."""
