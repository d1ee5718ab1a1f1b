import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import TINY, save_model
from transformers import AutoModelForCausalLM, LlamaConfig

from tailserve.engine.distill.job import new_head


def test_a_compiled_head_drafts_in_one_thread(tmp_path: Path) -> None:
    """PyTorch's operations between its steps, too, whatever Numba made of OpenMP's threads. In a process without a past."""
    config = LlamaConfig(**TINY | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    save_model(config, tmp_path / "verifier")
    verifier = AutoModelForCausalLM.from_pretrained(tmp_path / "verifier", dtype=torch.float32)
    new_head(verifier, (0, 2), torch.arange(64)).save(tmp_path / "head")
    program = f"""
from pathlib import Path
import torch
from tailserve.engine.model import eagle_loading
from tailserve.engine.options import LoadOptions
eagle_loading.head_is_cached = lambda dtype: True
torch.set_num_threads(2)
verifier = LoadOptions(path={str(tmp_path / "verifier")!r}, dtype="float32")
eagle_loading.load_eagle_drafter(Path({str(tmp_path / "head")!r}), verifier, num_blocks=8)
print(torch.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr[-2000:]
