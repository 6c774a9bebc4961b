"""`svdit selftest`: check the metric implementations on this machine."""

import argparse
from dataclasses import asdict

from svdit.cli.arguments import Parser, output, path
from svdit.cli.result import Result

DESCRIPTION = """\
Check the metric implementations on this machine, on data with known answers. With the Inception weights, ADM's
published samples (admnet_guided_upsampled_imagenet256.npz or admnet_guided_imagenet128.npz) and its reference batch,
also check the numbers that ADM's evaluator reports."""


def parser() -> Parser:
    """The command's flags."""
    p = Parser("svdit selftest", description=DESCRIPTION)
    p.add_argument("--adm-samples", metavar="NPZ", type=output)
    p.add_argument("--adm-reference", metavar="NPZ", type=output)
    p.add_argument(
        "--feature-extractor-weights", type=path, metavar="FILE", help="2015 Inception weights, for --adm-samples"
    )
    return p


def run(args: argparse.Namespace) -> Result:
    """Every check; a problem if one fails. Raises UserError for incomplete arguments."""
    from svdit.errors import UserError

    if (args.adm_samples is None) != (args.adm_reference is None):
        present, absent = ("samples", "reference") if args.adm_samples else ("reference", "samples")
        value = args.adm_samples or args.adm_reference
        raise UserError(f"--adm-{present} is {value}; pass --adm-{absent} together with it")
    if args.feature_extractor_weights and args.adm_samples is None:
        raise UserError("--feature-extractor-weights has no effect without --adm-samples and --adm-reference; omit it")
    from svdit.evaluation.selftest import formulas, regression

    checks = list(formulas())
    if args.adm_samples:
        checks += regression(args.adm_samples, args.adm_reference, args.feature_extractor_weights)
    width = max(len(check.name) for check in checks)
    lines = [
        f"{'ok  ' if check.passed else 'FAIL'} {check.name:{width}} {check.value:14.8g}, "
        f"expected {check.expected:.8g} ± {check.tolerance:.1g}"
        for check in checks
    ]
    failed = sum(not check.passed for check in checks)
    data = {"passed": not failed, "checks": [{**asdict(check), "passed": check.passed} for check in checks]}
    return Result(data, lines, problem=f"{failed} of {len(checks)} checks failed" if failed else "")
