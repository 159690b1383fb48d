"""Convert an official PIIP checkpoint into a folder for `from_pretrained`.

A published variant, downloaded from the official repository on the Hub or from a file you have:

    python scripts/convert_official_checkpoint.py --variant piip-tsb-368-192-128-in1k --output_dir piip-tsb
    python scripts/convert_official_checkpoint.py --variant piip-tsb-368-192-128-in1k --output_dir piip-tsb \\
        --checkpoint piip_3branch_tsb_368-192-128_cls_token_deit1.pth

Your own variant, trained with the official code: its `model` or `backbone` dictionary as JSON and its weights, a
`.pth` file or the `mp_rank_00_model_states.pt` of DeepSpeed:

    python scripts/convert_official_checkpoint.py --official_config my_config.json --official_codebase detection \\
        --checkpoint epoch_12.pth --output_dir my-piip

The folder holds weights (safetensors), configuration, image processor and code, and loads in any environment with
`AutoModel.from_pretrained(folder, trust_remote_code=True)`. A classification dictionary becomes an image classifier,
a segmentor with its `decode_head` a PiipForSemanticSegmentation, any other backbone dictionary a backbone whose
feature maps are the official ones in order. If anything does not fit, nothing is written.
"""

import argparse
import json
from pathlib import Path
from pickle import UnpicklingError

import torch

from modeling_piip.conversion import CODEBASES, convert_checkpoint, convert_variant_checkpoint, describe_left_out


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--variant", help="a published variant: the name of a folder in configuration/")
    source.add_argument(
        "--official_config", type=Path, help="JSON file with the official model or backbone dictionary"
    )
    parser.add_argument("--checkpoint", type=Path, help="official weights (default for a variant: downloaded)")
    parser.add_argument("--official_codebase", choices=CODEBASES, help="where the dictionary comes from; they differ")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights (default: as they are)"
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="new or empty folder to write to")
    args = parser.parse_args(argv)
    if args.official_config and not args.checkpoint:
        parser.error("--official_config needs --checkpoint: only published variants can be downloaded.")
    if args.variant and args.official_codebase:
        parser.error("--official_codebase goes with --official_config: a variant knows where it comes from.")
    return args


def read_official_config(path: Path) -> dict:
    try:
        official = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Write the dictionary with json.dump.") from error
    if not isinstance(official, dict):
        raise ValueError(
            f"{path} must hold the official model or backbone dictionary, got a {type(official).__name__}."
        )
    # the official files assign it to `model`
    return official.get("model", official)


def convert(args: argparse.Namespace) -> list[str]:
    dtype = args.dtype and getattr(torch, args.dtype)
    if args.variant:
        return convert_variant_checkpoint(args.variant, args.checkpoint, args.output_dir, dtype)
    official = read_official_config(args.official_config)
    return convert_checkpoint(official, args.checkpoint, args.output_dir, args.official_codebase, dtype)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        left_out = convert(args)
    except (OSError, ValueError, UnpicklingError) as error:
        raise SystemExit(f"error: {error}\nNothing was written.") from error
    for line in describe_left_out(left_out):
        print(line)
    print(f"Wrote {args.output_dir}")
    print(f'Load it: AutoModel.from_pretrained("{args.output_dir}", trust_remote_code=True)')


if __name__ == "__main__":
    main()
