"""The command line: ``sparsify-export MODEL ... -o OUT`` and its commands, from ``eval`` to ``simulate``."""

import difflib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.table import Table

from .commands import (
    bench_command,
    doctor_command,
    eval_command,
    generate_command,
    inspect_command,
    report_command,
    simulate_command,
)
from .passes.errors import InputError, NotBuiltError, VerificationError
from .signals import Stopped, stoppable
from .terminal import ProgressBar, errors, log_to, positive, quiet_libraries, terminal

DONE, FAULT, BAD_INPUT, NOT_BUILT, NOT_EQUAL, INTERRUPTED = 0, 1, 2, 3, 4, 130
ISSUES = "the project's issue tracker"  # which has no address of its own yet

app = App(
    name="sparsify-export",
    suppress_keyboard_interrupt=False,
    help="Compile a pretrained transformer into a sparse one that really is faster.",
)
COMMANDS = {
    command.__name__.removesuffix("_command"): command
    for command in (
        eval_command,
        bench_command,
        inspect_command,
        report_command,
        simulate_command,
        generate_command,
        doctor_command,
    )
}
for name, command in COMMANDS.items():
    app.command(command, name=name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, and prints one sentence for everything the user can mend."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    if not tokens:
        app.help_print()
        return BAD_INPUT
    if broken := [token for token in tokens if "\0" in token]:
        return _said(f"{broken[0]!r} holds a NUL, which no path or name can", BAD_INPUT)
    with quiet_libraries(), stoppable():
        return _run(tokens)


def _run(tokens: list[str]) -> int:
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except InputError as error:
        return _said(str(error), BAD_INPUT)
    except CycloptsError as error:
        return _said(_mistyped(tokens) or str(error), BAD_INPUT)
    except VerificationError as error:
        return _said(f"verification failed: {error}", NOT_EQUAL)
    except NotBuiltError as error:
        return _said(str(error), NOT_BUILT)
    except Stopped as stopped:
        return _said("interrupted", 128 + stopped.number)
    except KeyboardInterrupt:
        return _said("interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read what we print has enough; what Python still holds has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a path that no file can have, a disk that fails: what the system says names it
        where = f"{error.filename}: " if error.filename is not None else ""
        logging.getLogger(__name__).exception("the system refused")
        return _said(f"{where}{error.strerror or error}", BAD_INPUT)
    except MemoryError:
        return _said("this takes more memory than there is", BAD_INPUT)
    except Exception as error:
        logging.getLogger(__name__).exception("a fault of sparsify-export")
        kept = "" if _has_log(tokens) else "; run it again with --log-file FILE"
        return _said(
            f"this is a fault of sparsify-export, {type(error).__name__}: {str(error)[:200]}{kept}, and please report "
            f"it with the log at {ISSUES}",
            FAULT,
        )
    return DONE


def _said(sentence: str, code: int) -> int:
    errors.print(f"sparsify-export: {' '.join(sentence.split())}")
    return code


def _has_log(tokens: Sequence[str]) -> bool:
    return any(token == "--log-file" or token.startswith("--log-file=") for token in tokens)


def _mistyped(tokens: Sequence[str]) -> str:
    """What is wrong where the first word is neither a command nor a model, and no output is named; "" otherwise."""
    word = tokens[0]
    output = any(token in ("-o", "--output") or token.startswith("--output=") for token in tokens)
    if output or word.startswith("-") or "/" in word or "\0" in word or os.path.lexists(word):
        return ""
    near = difflib.get_close_matches(word, COMMANDS, 1)
    return f"{word} is no command and no model that exists{f'; did you mean {near[0]}?' if near else ''}"


@app.default
def compile_command(
    model: str,
    /,
    *,
    out: Annotated[str | None, Parameter(name=["--output", "-o"])] = None,
    nm: str | None = None,
    sparsity: float | None = None,
    effort: Literal["fast", "balanced", "best"] | None = None,
    score: Literal["ria", "wanda", "magnitude", "hessian"] | None = None,
    ria_power: float | None = None,
    permute: Literal["fold", "none"] | None = None,
    skip: tuple[str, ...] = (),
    mask: Path | None = None,
    update: Literal["none", "sparsegpt", "admm", "cg", "admm-cg", "alps"] | None = None,
    mask_from: Literal["update", "score"] | None = None,
    hessian: Literal["inputs", "attended"] | None = None,
    damping: float | None = None,
    allocate: Literal["none", "besa-row", "besa-layer", "besa-nm"] | None = None,
    besa_reference: Literal["pruned", "dense"] | None = None,
    besa_optimiser: Literal["adamw", "prodigy"] | None = None,
    besa_logits: Literal["softmax", "sigmoid"] | None = None,
    besa_rate_step: float | None = None,
    besa_epochs: int | None = None,
    besa_patterns: str | None = None,
    tune: Literal["none", "halves", "block"] | None = None,
    tune_epochs: int | None = None,
    tune_lr: float | None = None,
    distil: int | None = None,
    distil_lr: float | None = None,
    mask_moves: int | None = None,
    mask_rank: Literal["magnitude", "fisher"] | None = None,
    mask_pull: float | None = None,
    calibration: str | None = None,
    calibration_inputs: Path | None = None,
    samples: int | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    bos: bool = True,
    dtype: Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"] | None = None,
    group: Literal[32, 64, 128] | None = None,
    quantise: Literal["rtn", "sweep", "joint"] | None = None,
    ops: Literal["sparse", "standard"] | None = None,
    lower: Literal["always", "auto"] | None = None,
    lower_for: int | None = None,
    cache: Literal["joined", "in-place"] | None = None,
    speedup: float | None = None,
    bytes_: Annotated[float | None, Parameter(name="--bytes")] = None,
    max_loss: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    alternatives: Annotated[bool, Parameter(negative="")] = False,
    workload: str | None = None,
    batch: str | None = None,
    seq: str | None = None,
    context: int | None = None,
    workspace: int | None = None,
    level: Literal[3, 5] | None = None,
    eval_: Annotated[Path | None, Parameter(name="--eval")] = None,
    window: int | None = None,
    windows: int | None = None,
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    checkpoint: Path | None = None,
    also_checkpoint: Path | None = None,
    also_dtype: Literal["fp32", "bf16"] | None = None,
    triton: Path | None = None,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    log_file: Path | None = None,
) -> None:
    """Prune a model, verify it and write it as ONNX or as an engine; without --nm and --sparsity, only lower it.

    Args:
        model: Hugging Face folder, hub id, .gguf file or .onnx file.
        out: OUT.onnx (weights lie beside it), a folder, or OUT.plan for a TensorRT engine: where none can be
            built, the ONNX file for it and a script that builds it are written, and the exit code is 3.
        nm: keep N of every M neighbouring weights, e.g. 2:4.
        sparsity: fraction of zeros anywhere, between 0 and 1; an engine runs such linears by a plugin of ours.
        effort: the recipe that fills in flags not given; fast is score and fold, original weights; balanced, the
            default, is fold and the best update of the weights without gradients; best, which takes several times as
            long, trains all blocks together after that, and of --sparsity learns what each row loses (--allocate
            besa-row, --score wanda). An .onnx file has fast, the default without calibration text or inputs, and
            balanced with them; its channels stay where they are.
        score: what ranks the weights where no update chooses (--mask-from); default ria, of an .onnx file without
            calibration inputs from weights alone.
        ria_power: exponent of the activation norms in RIA; default 0.5.
        permute: fold channel orders into neighbouring weights where the graph allows it; default fold, and none for an
            .onnx file, which cannot be folded.
        skip: glob of module paths that stay dense, or one path as it is, brackets included; may be repeated.
        mask: .safetensors file of keep masks (bool or uint8, [out_features, in_features], named by module path) to
            prune by instead of a score; with --nm they are checked, linears without one stay dense.
        update: how the surviving weights make up for those that are gone: not at all, SparseGPT's sweep, ADMM with
            gradual zeros, conjugate gradients on the score's mask, ADMM and then conjugate gradients, or ALPS, the
            default of balanced and best: the same with a penalty that grows.
        mask_from: whether the update chooses the mask as it goes, its default, or keeps that of the score. Where
            --allocate learned what each row loses, ADMM or ALPS chooses which weights these are.
        hessian: what updates and sweeps fit a linear to: the tokens it reads, or, the default, where attention averages
            its outputs over tokens, what attention makes of those.
        damping: added to the diagonal of the update's Hessian, as a fraction of its mean; default the method's own.
        allocate: how --sparsity is shared out: none gives every row, or with RIA every matrix, the same rate;
            besa-row and besa-layer learn by gradient what each row or each linear loses, block by block; besa-nm learns
            which N:M pattern each linear gets.
        besa_reference: what a block's output is compared with: the dense block on the pruned model's inputs, the
            default by row, or the dense model's, the default by layer.
        besa_optimiser: AdamW, the default, or Prodigy, which finds its own step size.
        besa_logits: softmax, or as published softmax of a sigmoid, which reaches rates from 0.38 to 0.62 only.
        besa_rate_step: distance between candidate rates; default 0.01.
        besa_epochs: times that every window is used; more where that gives fewer than 128 steps; default 1.
        besa_patterns: what besa-nm chooses from; default 4:8,2:4,1:4,dense.
        tune: fine-tune the surviving weights against the dense block: not at all, the attention half and then the MLP
            half, or the whole block at once.
        tune_epochs: passes over the calibration windows at most, for each half.
        tune_lr: peak learning rate; a step moves a half's output by about this fraction of the error there is.
        distil: then train the surviving weights of all blocks together against what the dense model says, so many
            passes over the calibration windows; 0 for not at all. It needs memory for the whole model. With --quantise
            joint it is done twice: as floats, and then on the grid.
        distil_lr: peak learning rate, as a fraction of the root mean square of each weight; default 0.0015, of an
            encoder 0.0007. On a grid half of it.
        mask_moves: steps of --distil after which masks are chosen again, within their pattern or their rows' numbers
            of zeros, from weights that go on being trained behind zeros; the last third of the steps keeps them. 0 for
            masks that stay, the default. On a grid they stay.
        mask_rank: what they are chosen by: magnitude, or fisher, magnitude times the root of Adam's second moment.
        mask_pull: by what fraction a step at the peak learning rate shrinks what is behind a zero.
        calibration: text file, JSONL with a text field, or self, the default: text the model writes itself. An encoder
            reads texts one by one, as it will be given them: what stands between blank lines, or a line of JSONL, with
            a text_pair where a reranker reads two. An .onnx file takes a file, where its tokenizer lies beside it.
        calibration_inputs: folder of .npz batches, for models that do not take text, and any other; an .onnx file
            is also verified and timed on them.
        samples: calibration windows; default 128 of a file, 32 of the model's own text. An encoder reads as many texts
            as fill them.
        tokens: how many tokens to calibrate on, in place of --samples: as many windows as hold them.
        seq_len: tokens in a calibration window; default 2048 of a file, 512 of the model's own text or for an
            .onnx file.
        seed: of everything random.
        bos: begin windows of calibration and of --eval with the token that the tokenizer puts in front of a text, if
            it puts one.
        dtype: storage of packed weights, default fp32, or int8 or int4 where an .onnx file stores its own weights so;
            with int8 and int4 activations are quantised too, token by token. Of an engine, what everything is computed
            in: fp16, the default, bf16 or fp32; or int8 or fp8, for engines only, with --nm: products of pruned linears
            are of 8-bit codes between Q and DQ, activations with one scale each, calibrated, and the rest is fp16.
            TensorRT may run such products dense.
        group: neighbouring weights that share an int4 scale; default 128, or as an .onnx file of 4 bits has it.
        quantise: how pruned weights become int8 or int4: each to the nearest, the default of fast; by a sweep that
            hands errors on to other weights, the default of balanced; or joint, the default of best, where clipping
            strengths are learned too: by --tune or --distil together with the weights, by --allocate with the rates.
        ops: sparse ops, the default, or standard MatMul with zeros. Of an engine, sparse runs 2:4 linears by our plugin
            and not by TensorRT's own tactics, standard runs nothing by a plugin.
        lower: sparse ops for every weight that gets smaller, the default, or (auto) not for those that this machine
            runs slower.
        lower_for: tokens in a call that --lower auto decides for; default 1, decoding.
        cache: what a decoder does with the keys and values of a token: join them to a copy of the cache, the default,
            which any runtime can do, or write them into it, by an attention of ONNX Runtime's own.
        speedup: the least damage at a speed-up of so much over the dense float32 file, measured on this machine in the
            --workload. With --nm or --sparsity linears get those zeros or stay dense; without, each gets the form that
            pays most of all that have a kernel: dense int8 and int4, and several patterns in several types.
        bytes_: likewise at this fraction of the dense float32 file's bytes.
        max_loss: likewise the fastest whose perplexity on --eval grows by so much at most, such as 2%.
        dry_run: prune and write nothing: print what is predicted of every form and of mixtures of them, in seconds to
            minutes. -o is not wanted then.
        alternatives: make what else the model could be, and compare: dense float32, ONNX Runtime's own int8 and int4,
            and every pattern of a mix in all linears, with times in the --workload, bytes, and perplexity on --eval.
        workload: what --speedup, --max-loss and --alternatives are measured in: decode:64, the default, is one token
            behind a cache of 64; prefill:128 a prompt of 128 tokens, prefill:128x8 eight of them; run, a model that
            takes no text.
        batch: texts at once that an engine takes, as min,opt,max; default 1,1,1.
        seq: tokens at once that an engine takes, as min,opt,max; default 1 to a quarter of the context, best at 128;
            longer prompts are read in pieces. Without a KV cache to the context.
        context: tokens of a text at most that an engine takes; default what the model takes, up to 2048.
        workspace: MiB of memory that a tactic of an engine may use; default as TensorRT decides.
        level: how long TensorRT looks for the fastest tactics of an engine: 3, its own default, or 5, which is longer.
        eval_: text file to measure perplexity on, before and after; exact answers are counted as well.
        window: tokens in an evaluation window; default 2048.
        windows: evaluation windows at most.
        trust_remote_code: run Python code that comes with the checkpoint.
        overwrite: replace what is at OUT.
        checkpoint: folder that keeps every block and every epoch that is done, so that the same command goes on from
            there when it was stopped; removed at the end.
        also_checkpoint: folder that the same weights are written to as a dense checkpoint of transformers, zeros and
            all: what other programs read. Nothing may be there yet.
        also_dtype: type of the weights in that checkpoint; default fp32, which is what OUT holds bit for bit.
        triton: repository of Triton Inference Server that OUT is copied to as well, with its config.pbtxt; its name
            there is that of OUT, and nothing may be called so yet.
        quiet: print nothing but errors.
        log_file: file that warnings of libraries and, where something goes wrong, tracebacks are appended to.
    """
    log_to(log_file)
    if out is None and not dry_run:
        raise InputError(_mistyped([model]) or "-o OUT is missing: the .onnx or .plan file, or the folder, to write")
    if out is not None and dry_run:
        raise InputError(f"-o {out} has no effect with --dry-run, which writes nothing")
    out = out or ""
    from .calibrate.patterns import NM
    from .compile import compile_model
    from .dry_run import predict
    from .dry_run import render as render_frontier
    from .effort import Flags, effort_of, make_recipe
    from .passes.checkpoint import Checkpoint
    from .passes.dialect.storage import FP32, Storage
    from .passes.given_masks import read_masks
    from .passes.onnx.own_storage import GROUP, own_storage
    from .plan import EngineSettings, check_codes, check_engine_flags, not_built
    from .report import render
    from .runtime.workload import Workload
    from .settings import Calibration, Settings, check_budget, make_budget, parse_pattern
    from .triton_repository import check_triton, write_triton

    positive("--context", context, least=2)
    positive("--workspace", workspace)
    engine = check_engine_flags(
        model,
        out,
        EngineSettings(batch, seq, context, workspace, level, ops),
        dtype=dtype,
        quantise=quantise,
        refused={
            "--group": group,
            "--lower": lower,
            "--lower-for": lower_for,
            "--cache": cache,
        },
    )
    if cache is not None and model.endswith(".onnx"):
        raise InputError(f"--cache {cache} has no meaning for an .onnx file, whose graph stays as it is")
    # What an .onnx file stores in 8 or 4 bits would grow in floats, pruned or not.
    said = dtype
    asked = model.endswith(".onnx") and Path(model).is_file() and not engine and ops != "standard"
    own = own_storage(Path(model)) if asked and (dtype is None or (dtype == "int4" and group is None)) else None
    dtype = dtype or (own.kind if own else "fp16" if engine else "fp32")
    ops = ops or ("standard" if engine else "sparse")
    positive("--samples", samples)
    positive("--tokens", tokens)
    if tokens is not None and samples is not None:
        raise InputError(f"--samples {samples} and --tokens {tokens} were both given; want at most one of them")
    positive("--seq-len", seq_len, least=2)
    if also_dtype is not None and also_checkpoint is None:
        raise InputError(f"--also-dtype {also_dtype} has no effect without --also-checkpoint")
    if not 0 <= seed < 1 << 63:
        raise InputError(f"--seed {seed} is out of range; want 0 to 2^63 - 1")
    positive("--window", window, least=2)
    positive("--windows", windows)
    for flag, value in {"--window": window, "--windows": windows}.items():
        if value is not None and eval_ is None and not model.endswith(".onnx"):
            raise InputError(f"{flag} {value} has no effect without --eval")
    for flag, text in {"--calibration": calibration, "--seq-len": seq_len, "--tokens": tokens}.items():
        if text is not None and calibration_inputs is not None:
            raise InputError(f"{flag} {text} has no effect beside --calibration-inputs, whose batches are as they are")
    if group is not None and dtype != "int4":
        raise InputError(f"--group {group} has no effect without --dtype int4")
    if quantise is not None and ops == "standard" and engine is None:
        raise InputError(f"--quantise {quantise} has no effect with --ops standard, which writes floats")
    if dtype != "fp32" and ops == "standard" and engine is None:
        raise InputError(f"--dtype {dtype} has no effect with --ops standard, which writes the weights as they are")
    codes = engine.codes if engine else None
    if codes is None:
        assert dtype != "fp8"  # which was refused without an engine
        shared = group or (own.group if own else 0) or GROUP
        storage = Storage(dtype, shared if dtype == "int4" else 0)
        on_grid = storage if ops == "sparse" else FP32
    else:
        storage = Storage("fp16")
        on_grid = Storage("int8", half_scales=True) if codes == "int8" else FP32
    pattern = parse_pattern(nm, sparsity)
    budget = make_budget(speedup, bytes_, max_loss, workload, dry=dry_run, compared=alternatives)
    free = budget is not None and pattern is None and mask is None
    if free:  # the recipe's own pattern is that of no linear then
        pattern, on_grid = NM(2, 4), Storage("int4", group or 32) if said is None else on_grid
    if not bos and eval_ is None and (calibration_inputs is not None or (pattern is None and mask is None)):
        raise InputError("--no-bos has no effect where no text is read: neither calibration text nor --eval")
    if not bos and model.endswith(".onnx") and calibration in (None, "self"):
        raise InputError("--no-bos has no effect on an .onnx file without --calibration TEXT, since no text is read")
    if calibration == "self" and model.endswith(".onnx"):
        raise InputError("--calibration self has no meaning for an .onnx file, which writes no text; give a text file")
    given = read_masks(mask) if mask is not None else None
    is_onnx = model.endswith(".onnx")
    if pattern is None and given is None:
        _refuse_ignored(
            {
                "--score": score,
                "--ria-power": ria_power,
                "--permute": permute,
                "--skip": skip or None,
                "--effort": effort,
                "--update": update,
                "--mask-from": mask_from,
                "--hessian": hessian,
                "--damping": damping,
                "--allocate": allocate,
                "--besa-reference": besa_reference,
                "--besa-optimiser": besa_optimiser,
                "--besa-logits": besa_logits,
                "--besa-rate-step": besa_rate_step,
                "--besa-epochs": besa_epochs,
                "--besa-patterns": besa_patterns,
                "--tune": tune,
                "--tune-epochs": tune_epochs,
                "--tune-lr": tune_lr,
                "--distil": distil,
                "--distil-lr": distil_lr,
                "--mask-moves": mask_moves,
                "--mask-rank": mask_rank,
                "--mask-pull": mask_pull,
                "--quantise": None if quantise == "rtn" else quantise,  # which packing does by itself
                "--calibration": None if is_onnx else calibration,
                "--samples": None if is_onnx else samples,
                "--tokens": tokens,
                "--seq-len": seq_len,
                "--checkpoint": checkpoint,
            }
        )
    flags = Flags(
        effort=effort,
        score=score,
        ria_power=ria_power,
        permute=permute,
        skip=skip,
        update=update,
        mask_from=mask_from,
        hessian=hessian,
        damping=damping,
        given=given,
        allocate=allocate,
        besa_reference=besa_reference,
        besa_optimiser=besa_optimiser,
        besa_logits=besa_logits,
        besa_rate_step=besa_rate_step,
        besa_epochs=besa_epochs,
        besa_patterns=besa_patterns,
        tune=tune,
        tune_epochs=tune_epochs,
        tune_lr=tune_lr,
        distil=distil,
        distil_lr=distil_lr,
        mask_moves=mask_moves,
        mask_rank=mask_rank,
        mask_pull=mask_pull,
        quantise=quantise,
        storage=on_grid,
        seed=seed,
        inputs=calibration_inputs is not None or (is_onnx and calibration not in (None, "self")),
    )
    recipe = make_recipe(pattern, flags, onnx=is_onnx) if pattern or given else None
    check_codes(codes, recipe)
    if lower == "auto" and ops == "standard":
        raise InputError("--lower auto has no effect with --ops standard, which lowers nothing")
    if lower_for is not None and lower != "auto":
        raise InputError(f"--lower-for {lower_for} has no effect without --lower auto")
    positive("--lower-for", lower_for)
    if budget is not None:
        budget = replace(budget, pattern=not free, storage=None if free and said is None else storage)
        check_budget(
            budget,
            recipe,
            {
                f"{model}, an .onnx file": is_onnx,
                f"{out}, an engine": engine is not None,
                "--ops standard": ops == "standard",
                "--lower auto": lower == "auto",
                "--cache in-place": cache == "in-place",
                "--checkpoint, for what was measured once will not be measured again": checkpoint is not None,
            },
            evaluated=eval_ is not None or dry_run,
        )
    if dry_run:
        idle = {
            "--overwrite": overwrite or None,
            "--also-checkpoint": also_checkpoint,
            "--triton": triton,
            "--eval": eval_ if max_loss is None else None,
        }
        if unused := [flag for flag, value in idle.items() if value is not None]:
            raise InputError(f"{unused[0]} has no effect with --dry-run, which writes and measures no result")
    in_a_call = (lower_for or 1) if lower == "auto" else None
    served = check_triton(triton, Path(out)) if triton is not None else None
    source = Calibration(calibration or "self", calibration_inputs, samples, seq_len, seed, tokens)
    settings = Settings(recipe, source, storage, ops, in_a_call, eval_, window or Settings.window, windows, engine, bos)
    if alternatives:
        suited = {
            f"{model}, an .onnx file": is_onnx,
            f"{out}, an engine": engine is not None,
            "--ops standard": ops == "standard",
            "--dry-run": dry_run,
            "--cache in-place, which they do not have": cache == "in-place",
        }
        if unsuited := [what for what, there in suited.items() if there]:
            raise InputError(f"--alternatives cannot be had with {unsuited[0]}")
    timed = Workload.parse(workload) if alternatives and workload is not None else None
    settings = replace(
        settings, budget=budget, cache=cache or Settings.cache, alternatives=alternatives, workload=timed
    )
    with ProgressBar(quiet) as console:
        if not quiet:
            chosen = effort_of(flags, onnx=is_onnx) if recipe else None
            terminal.print(_settings_table(model, out, chosen, settings, own))
        if dry_run:
            frontier = predict(model, settings, trust_remote_code=trust_remote_code, console=console.as_console())
            terminal.print(render_frontier(frontier))
            return
        report = compile_model(
            model,
            out,
            settings,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            checkpoint=checkpoint,
            also=(also_checkpoint, also_dtype or "fp32") if also_checkpoint is not None else None,
            console=console.as_console(),
        )
    if checkpoint is not None:
        Checkpoint(checkpoint).remove()
    if served is not None:
        write_triton(Path(out), served)
    if not quiet:
        terminal.print(render(report))
    if report.engine is not None and report.engine["not_built"]:
        raise NotBuiltError(not_built(Path(out), report.engine))
    if not quiet:
        terminal.print(f"wrote {out}", highlight=False)


def _refuse_ignored(flags: dict[str, object]) -> None:
    """A flag without effect is a mistake somewhere, so it is refused rather than ignored."""
    if given := [flag for flag, value in flags.items() if value is not None]:
        raise InputError(f"{given[0]} has no effect without --nm or --sparsity, since nothing is pruned")


def _settings_table(model: str, out: str, effort: str | None, settings: Any, own: Any) -> Table:
    from .onnx_in import told
    from .settings import plain

    table = Table("setting", "value", title="sparsify-export", title_justify="left")
    table.add_row("model", model)
    table.add_row("out", out or "nothing: --dry-run")
    if effort is not None:
        table.add_row("effort", effort)
    for name, value in (told(settings) if model.endswith(".onnx") else plain(settings)).items():
        if value not in (None, []):
            as_given = own is not None and value == {"dtype": own.kind, "group": own.group}.get(name)
            said = f"{value}, as the file stores its weights" if as_given else str(value)
            table.add_row(name.replace("_", " "), said)
    return table
