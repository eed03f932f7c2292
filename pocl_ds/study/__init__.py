"""Studies: many recipes that differ in a field or two, run so that what they have in common is done
once.
"""
