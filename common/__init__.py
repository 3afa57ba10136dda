"""What the scripts share: rooms of modules whose functions take arguments; they never read a script's settings."""

import logging
import os
import sys
import warnings

# Before any library is imported: their notes about each other's future, which no user can act on, stay off the screen.
warnings.filterwarnings("ignore", category=FutureWarning)
# peft, for a base named by a short name, which is on no hub.
warnings.filterwarnings("ignore", message="Could not find a config file|Unable to fetch remote file")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # looks for a CPU kernel on the hub, and says it found none
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
os.environ.setdefault("TQDM_DELAY", "2")  # libraries' progress bars appear where something takes so many seconds
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before CUDA starts: rows of new lengths would leave holes between blocks. Not on WSL, where drivers before 615 fail
# (pytorch issue 192330), and not over a choice of the user's.
CHOSEN = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
if sys.platform == "linux" and "microsoft" not in os.uname().release and not any(map(os.environ.get, CHOSEN)):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
