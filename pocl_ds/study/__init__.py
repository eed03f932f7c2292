"""Studies: grids of recipes that differ in a few fields; steps that they share run once."""
