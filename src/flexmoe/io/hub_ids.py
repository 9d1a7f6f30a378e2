"""The form of a repository id on the Hugging Face Hub.

Does not cover whether such a repository exists (`flexmoe.hub.client`).
"""

import re

HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$|[.-]$|[.-]/))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
"""Matches, as a full match, what the Hub accepts as an id, both in a model card and as a repository to push to.

Source: `huggingface_hub.utils.validate_repo_id`
"""

__all__ = ["HUB_ID"]
