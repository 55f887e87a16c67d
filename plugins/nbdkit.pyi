# What nbdkit's python plugin offers the script that it runs, as far as fleece.py uses it.
THREAD_MODEL_PARALLEL: int
FLAG_MAY_TRIM: int
FLAG_FUA: int
FLAG_REQ_ONE: int
FLAG_FAST_ZERO: int
FUA_NONE: int
FUA_NATIVE: int
CACHE_NONE: int
CACHE_NATIVE: int

def debug(msg: str) -> None: ...
def export_name() -> str: ...
def set_error(err: int) -> None: ...
