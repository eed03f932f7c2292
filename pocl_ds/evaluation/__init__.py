"""What a student is worth: answers to benchmarks, held-out loss, KL to the teacher; and the student
as others get it.
"""
