"""What is learnt from: frozen teachers, and the cache of what they predict."""
