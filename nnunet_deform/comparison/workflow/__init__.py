"""The experiment as a Snakemake workflow, for clusters. Snakemake lives in an environment of its own and imports
nothing of ours: the Snakefile reads ``jobs.json`` and calls ``nnunet-deform compare`` by its path."""

from nnunet_deform.comparison.workflow.write import PROFILES, write_workflow

__all__ = ["PROFILES", "write_workflow"]
