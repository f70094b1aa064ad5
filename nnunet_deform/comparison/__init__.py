"""Rigorous comparison of arms (a trainer with a plan): one experiment file, paired statistics, one report."""
