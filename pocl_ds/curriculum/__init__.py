"""The curriculum: subsets and stages, what changes from stage to stage, and which samples a step
sees. Pure code.
"""
