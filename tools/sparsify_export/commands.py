"""The commands beside compiling, from ``eval`` to ``doctor``.

What a command needs is imported when it runs: torch and ONNX Runtime take seconds, and ``--help`` shall not.
"""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .passes.errors import InputError
from .terminal import ProgressBar, log_to, positive, terminal


def eval_command(
    model: str,
    /,
    *,
    text: Path | None = None,
    exact: Annotated[bool, Parameter(negative="")] = False,
    retrieval: Path | None = None,
    window: int | None = None,
    windows: int | None = None,
    tokenizer: str | None = None,
    bos: bool = True,
    verify: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False,
    log_file: Path | None = None,
) -> None:
    """Perplexity of a model or an exported file over windows of a text, exact answers, or how well it finds passages.

    Args:
        model: an .onnx file, an engine, a folder this tool wrote, a Hugging Face folder, hub id or .gguf file.
        text: plain text, or JSONL with a text field, to measure perplexity on.
        exact: count exactly right answers to small problems: copying, brackets, arithmetic.
        retrieval: folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/test.tsv): nDCG@10 and recall@10 of an
            embedding model, pooled as modules.json beside it says, else by the mean, normalised.
        window: tokens in a window; default 2048, or what the model takes if that is less.
        windows: windows at most; default all of the text.
        tokenizer: model whose tokenizer to use, for an .onnx file that has none beside it.
        bos: begin every window with the token that the tokenizer puts in front of a text, if it puts one.
        verify: first compare the data of every sparse linear with the checksum that was written with the file.
        json: print JSON.
        trust_remote_code: run Python code that comes with the checkpoint.
        log_file: file that warnings of libraries and tracebacks are appended to.
    """
    log_to(log_file)
    from dataclasses import asdict
    from json import dumps

    from . import frontdoor

    if verify:
        _verify(Path(model))
    positive("--window", window, least=2)
    positive("--windows", windows)
    if retrieval is not None:
        without = {"--text": text, "--exact": exact, "--window": window, "--windows": windows, "--no-bos": not bos}
        if unread := [flag for flag, value in without.items() if value]:
            raise InputError(f"{unread[0]} has no effect with --retrieval, which embeds texts")
        _evaluate_retrieval(model, retrieval, tokenizer, trust_remote_code=trust_remote_code, json=json)
        return
    if text is None and not exact:
        raise InputError("there is nothing to evaluate; give --text FILE, --exact, both, or --retrieval FOLDER")
    with ProgressBar(quiet=json) as console:
        result, answers = frontdoor.evaluate(
            model,
            text,
            exact=exact,
            window=window,
            windows=windows,
            tokenizer=tokenizer,
            bos=bos,
            trust_remote_code=trust_remote_code,
            progress=console.progress,
        )
    if json:
        terminal.print_json(dumps((asdict(result) if result else {}) | ({"exact": asdict(answers)} if answers else {})))
        return
    if result:
        where = f"{result.windows} windows of {result.window} tokens"
        terminal.print(f"perplexity {result.perplexity:.2f} over {where}", highlight=False)
    if answers:
        terminal.print(f"exact answers: {answers}", highlight=False)


def _evaluate_retrieval(
    model: str, folder: Path, tokenizer: str | None, *, trust_remote_code: bool, json: bool
) -> None:
    """What ``eval --retrieval`` prints."""
    from dataclasses import asdict
    from json import dumps

    from . import frontdoor

    with ProgressBar(quiet=json) as console:
        found, embedder = frontdoor.evaluate_retrieval(
            model, folder, tokenizer=tokenizer, trust_remote_code=trust_remote_code, progress=console.progress
        )
    if json:
        terminal.print_json(dumps({"retrieval": asdict(found), "pooling": asdict(embedder.pooling)}))
    else:
        terminal.print(f"{found}\n{embedder.pooling}", highlight=False)


def bench_command(
    model: Path,
    /,
    *,
    against: Path | None = None,
    inputs: Path | None = None,
    repeats: int = 20,
    threads: int | None = None,
    verify: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    log_file: Path | None = None,
) -> None:
    """Time prefill and decode of an exported file or engine, in turns with another one.

    Args:
        model: the file under test.
        against: the file to compare with.
        inputs: folder of .npz files with arrays named like the model's inputs, a row each. Without it they are made up.
        repeats: runs of each row and file.
        threads: threads of an op, the same for both files.
        verify: first compare the data of every sparse linear with the checksum that was written with the file.
        json: print JSON.
        log_file: file that warnings of libraries and tracebacks are appended to.
    """
    log_to(log_file)
    from .runtime.benchmark import bench, render

    if verify:
        _verify(model)
    positive("--repeats", repeats)
    positive("--threads", threads)
    with ProgressBar(quiet=json) as console:
        report = bench(model, against, inputs=inputs, repeats=repeats, threads=threads, progress=console.progress)
    if json:
        terminal.print_json(report.to_json())
    else:
        terminal.print(render(report))
        for reason in report.skipped:
            terminal.print(f"left out {reason}", highlight=False)


def _verify(model: Path) -> None:
    """What ``--verify`` does before a file is run.

    Raises:
        InputError: it is no file of ours, or its data are not what was written.
    """
    from .passes.onnx.checksums import verify_checksums
    from .runtime.session import model_file

    verify_checksums(model_file(model))


def inspect_command(
    model: Path, /, *, verify: Annotated[bool, Parameter(negative="")] = False, log_file: Path | None = None
) -> None:
    """List every linear of an ONNX file: shape, pattern, bytes, lowered or left dense and why.

    Args:
        model: an .onnx file, or a folder that holds model.onnx.
        verify: instead, compare the data of every sparse linear with the checksum that was written with the file.
        log_file: file that warnings of libraries and tracebacks are appended to.
    """
    log_to(log_file)
    from .passes.onnx.checksums import verify_checksums
    from .runtime.inspection import inspect, render
    from .runtime.session import model_file

    if verify:
        checked = verify_checksums(model_file(model))
        terminal.print(f"{checked.linears} linears, {checked.nbytes} bytes: as they were written", highlight=False)
    else:
        terminal.print(render(inspect(model)))


def report_command(
    model: Path,
    other: Path | None = None,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("report.html"),
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    log_file: Path | None = None,
) -> None:
    """Write what a compilation gained and lost as one HTML file, which loads nothing; of two, one below the other.

    Args:
        model: a folder or file that this tool wrote, beside which its report lies, or a report itself.
        other: another one.
        out: the file to write.
        overwrite: replace it where it exists.
        log_file: file that warnings of libraries and tracebacks are appended to.
    """
    log_to(log_file)
    from .html_report import read_view, render_html

    page = render_html([read_view(path) for path in (model, other) if path is not None])
    if out.suffix != ".html":
        raise InputError(f"{out} does not end in .html")
    try:
        with out.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(page)
    except FileExistsError as error:
        raise InputError(f"{out} exists already; remove it or give --overwrite") from error
    terminal.print(f"wrote {out}", highlight=False)


def doctor_command(*, log_file: Path | None = None) -> None:
    """What works on this machine, and the command that mends what does not; nothing is changed.

    Args:
        log_file: file that warnings of libraries and tracebacks are appended to.
    """
    log_to(log_file)
    from .doctor import examine, render

    checks = examine()
    terminal.print(render(checks))
    if broken := [check for check in checks if check.needed and not check.works]:
        raise InputError(f"{broken[0].what}: {broken[0].found}; mend it with: {broken[0].mend}")


def simulate_command(
    model: str,
    /,
    *,
    tokens: int = 1,
    paper_compat: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False,
    log_file: Path | None = None,
) -> None:
    """Cycles of every projection on an accelerator with a dense and a sparse engine; a simulation, nothing is timed.

    The machine is that of Table 5 in the BESA paper (ViTCoD: 64 lines of 64 multipliers, 76.8 GB/s at 500 MHz). The
    published formula counts products of a matrix as if it were square, rows as if they were equally long, and no
    memory. Corrected here: out_features x in_features products, lines that wait for the longest row of each 64, and
    the bytes of weights and positions. The zeros are those of the weights as they are.

    Args:
        model: an .onnx file, a folder this tool wrote, a Hugging Face folder, hub id or .gguf file.
        tokens: tokens in a call; with few of them memory decides.
        paper_compat: the published formula, for one token.
        json: print JSON.
        trust_remote_code: run Python code that comes with the checkpoint.
        log_file: file that warnings of libraries and tracebacks are appended to.
    """
    log_to(log_file)
    from dataclasses import asdict
    from json import dumps

    from . import frontdoor
    from .simulator import render

    positive("--tokens", tokens)
    if paper_compat and tokens != 1:
        raise InputError(f"--tokens {tokens} cannot be had with --paper-compat, whose formula is for one token")
    with ProgressBar(quiet=json) as console:
        found = frontdoor.simulate(
            model,
            tokens=tokens,
            paper_compat=paper_compat,
            trust_remote_code=trust_remote_code,
            progress=console.progress,
        )
    if json:
        terminal.print_json(dumps([asdict(one) for one in found]))
    else:
        terminal.print(render(found))


def generate_command(
    model: Path,
    /,
    *,
    prompt: str,
    max_new_tokens: int = 64,
    tokenizer: str | None = None,
    bos: bool = True,
    threads: int | None = None,
    kernels: bool = True,
    verify: Annotated[bool, Parameter(negative="")] = False,
    log_file: Path | None = None,
) -> None:
    """Continue a prompt greedily, with the KV cache.

    Args:
        model: an exported file or folder, or an engine.
        prompt: the text to continue.
        max_new_tokens: tokens to write at most.
        tokenizer: model whose tokenizer to use, for an .onnx file that has none beside it.
        bos: begin with the token that the tokenizer puts in front of a text, if it puts one.
        threads: threads of an op.
        kernels: use our kernels; without, ONNX Runtime runs the functions inside the file.
        verify: first compare the data of every sparse linear with the checksum that was written with the file.
        log_file: file that warnings of libraries and tracebacks are appended to.
    """
    log_to(log_file)
    from . import frontdoor

    if verify:
        _verify(model)
    positive("--max-new-tokens", max_new_tokens)
    positive("--threads", threads)
    text, result = frontdoor.generate(
        model, prompt, max_new_tokens=max_new_tokens, tokenizer=tokenizer, bos=bos, threads=threads, kernels=kernels
    )
    terminal.print(prompt + text, highlight=False)
    terminal.print(
        f"prefill {result.prompt_tokens} tokens at {result.prefill_rate:.1f} tokens/s, "
        f"decode {result.decoded_tokens} at {result.decode_rate:.1f} tokens/s",
        highlight=False,
    )
