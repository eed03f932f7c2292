"""What is said of a text: ROUGE-L, exact match, repetition; and how sure a mean over items is."""
