"""`svdit selftest`: does this installation compute the metrics correctly?"""

import argparse
import sys
from pathlib import Path

from svdit.cli.arguments import Parser

DESCRIPTION = """\
Every metric on data whose answer is known on paper. With the Inception weights, ADM's published samples
(admnet_guided_upsampled_imagenet256.npz or admnet_guided_imagenet128.npz) and its reference batch, also the numbers
that ADM's own evaluator prints."""


def parser() -> Parser:
    p = Parser("svdit selftest", description=DESCRIPTION)
    p.add_argument("--adm-samples", metavar="NPZ", type=Path)
    p.add_argument("--adm-reference", metavar="NPZ", type=Path)
    p.add_argument("--feature-extractor-weights", metavar="FILE", help="2015 Inception weights")
    return p


def run(args: argparse.Namespace) -> None:
    from svdit.errors import UserError

    if (args.adm_samples is None) != (args.adm_reference is None):
        raise UserError("--adm-samples and --adm-reference are needed together")
    from svdit.evaluation.selftest import formulas, regression

    checks = list(formulas())
    if args.adm_samples:
        checks += regression(args.adm_samples, args.adm_reference, args.feature_extractor_weights)
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = "ok  " if check.passed else "FAIL"
        print(
            f"{verdict} {check.name:{width}} {check.got:14.8g}, should be {check.expected:.8g} ± {check.tolerance:.1g}"
        )
    if not all(check.passed for check in checks):
        sys.exit(1)
