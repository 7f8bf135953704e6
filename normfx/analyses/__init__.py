"""Analyses: what rules ask about the values of a graph. They edit nothing; unknown is a refusal."""
