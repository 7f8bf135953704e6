"""Analyses: what holds for each value of a captured graph, for rules and reports to ask."""
