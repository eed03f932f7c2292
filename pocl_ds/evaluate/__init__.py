"""What the student can do: answers on benchmarks, held-out loss and KL, tables, and the exported folder (METHOD 5)."""
