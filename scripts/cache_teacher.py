"""Cache teacher predictions on a dataset once for many students: the top-k next tokens at every position.

    python scripts/cache_teacher.py --teachers runs/a runs/b --data data/train --block_size 128 --k 64 --output cache/

Train with `--objective distillation --distillation.cache cache/ --distillation.divergence topk_kl`. Repeat an
interrupted call to resume it. To split the work over several calls, on one machine or many: `--parts 4`, with
`--part 0` to `--part 3`. The temperature is baked into the cache: the student's run must use the same one.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import RESUMES, ScriptParser, end_on_ctrl_c, given_fields, run_script

end_on_ctrl_c()

from pretrain.distillation.cache_request import CacheRequest


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_fields(CacheRequest)
    request = CacheRequest(**given_fields(CacheRequest, parser.parse_args()))
    from pretrain.distillation.write_cache import cache_teachers

    print(cache_teachers(request))


if __name__ == "__main__":
    run_script(main, RESUMES)
