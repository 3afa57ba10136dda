"""What the scripts share: rooms of modules whose functions take arguments; they never read a script's settings."""

import logging
import os
import warnings

# Before any library is imported: their notes about each other's future, which no user can act on, stay off the screen.
warnings.filterwarnings("ignore", category=FutureWarning)
# peft, for a base named by a short name, which is on no hub.
warnings.filterwarnings("ignore", message="Could not find a config file|Unable to fetch remote file")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # looks for a CPU kernel on the hub, and says it found none
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
