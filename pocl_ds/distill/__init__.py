"""The heart: divergences, the fused head, student and teacher, the engines and the loop that drives
them.
"""
