"""What is said of a text: ROUGE-L, exact match, repetition."""
