"""sft -> rm -> policy: finds the model a stage needs, or trains it once and keeps it under a digest.

`keys` says what decides an artifact, `cache` keeps artifacts under their keys, `resolve` builds what is missing.
"""

from rlhf_cli.stages.keys import file_digest
from rlhf_cli.stages.resolve import resolve_members, resolve_rm, resolve_sft

__all__ = ["file_digest", "resolve_members", "resolve_rm", "resolve_sft"]
