"""Imported first: what transformers and bitsandbytes would otherwise look for on the network, or say on import."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# It warns of an optional package that is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
