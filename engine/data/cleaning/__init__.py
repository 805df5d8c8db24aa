"""The cleaners of the papers, by the name of the corpus."""
