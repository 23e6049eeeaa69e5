"""Run what the documentation says: every command in a shell, every Python block, every config, every notebook.

    python -m documentation.check                 # all of it, in the order of the pages
    python -m documentation.check 3/24            # the third of 24 parts that take about as long as each other
    python -m documentation.check docs/init.md    # one page

Commands are run as they are written, in a world of small data (documentation/world.py); a page has one shell. Those that do not end by
themselves (ENDLESS) are ended once they have shown that they work. Those that cannot run here are named in documentation/excused.py.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from yaml import YAMLError

from distmtl.errors import DistmtlError
from documentation import fragments
from documentation.blocks import ROOT, Block, blocks_of, notebooks, pages
from documentation.excused import EXCUSED
from documentation.world import RECIPES, World, mentioned, writes

TIMEOUT_S = 600
FOLDER = ROOT / "build" / "docs-check"

# Commands that go on until they are ended, or for minutes: what shows in the shell that they work.
ENDLESS = (
    (r"distmtl serve (?!.*--openapi)", "curl -sf localhost:{port}/v1/ready"),
    (r"distmtl train .*--follow .*--publish", "find exports -newer .started -name manifest.json | grep ."),
    (r"distmtl train .*--follow", "find runs -newer .started -name follow.jsonl | xargs cat | grep ."),
    (r"distmtl watch .*--browser", "curl -sf localhost:{port}/"),
    (r"tensorboard --logdir", "curl -sf localhost:{port}/"),
    (r"distmtl leaderboard", "find leaderboards -newer .started -name result.json | grep ."),
)

PORTS = {"watch": "8765", "tensorboard": "6006"}  # where no --port says another

# About how many seconds they take, the start of Python and of Ray included; what is not here takes SECONDS.
SECONDS = 6
TAKES = (
    (r"distmtl (train|predict .*--workers)", 25),
    (r"distmtl (serve|leaderboard|tune|verify)", 40),
    (r"distmtl report(?!.*--no-model)", 15),
    (r"make quickstart", 40),
    (r"make docs|pytest|benchmarks\.|torchrun", 25),
    (r"distmtl (config|doctor|health)", 4),
)
NOTEBOOK_S = 45


@dataclass
class Unit:
    """Blocks that only work one after the other, in one shell."""

    page: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def seconds(self) -> int:
        return sum(seconds(b) for b in self.blocks)


def seconds(block: Block) -> int:
    if block.kind == "notebook":
        return NOTEBOOK_S
    if block.kind == "yaml" or block.plain in EXCUSED:
        return 0
    return next((s for pattern, s in TAKES if re.search(pattern, block.plain)), SECONDS)


def units() -> list[Unit]:
    """Of all pages and notebooks, in their order."""
    found: list[Unit] = []
    for page in pages():
        last = None
        for block in blocks_of(page):
            if not (last and _belongs_to(last, block)):
                found.append(Unit(block.page))
            found[-1].blocks.append(block)
            last = block if block.kind == "command" else last
    for notebook in notebooks():
        name = str(notebook.relative_to(ROOT))
        found.append(Unit(name, [Block(name, 1, "notebook", name)]))
    return found


def _belongs_to(last: Block, block: Block) -> bool:
    """What asks a server, ends it or has another one's variables needs the command before."""
    if block.kind != "command":
        return False
    return bool(re.match(r"(curl|kill|wait|unset)\b", block.plain) or re.match(r"(export|cd)\b", last.plain))


def part_of(all_units: list[Unit], i: int, n: int) -> list[Unit]:
    """The i-th of n parts, cut by time; what takes none goes with what it stands beside."""
    whole, done, part = sum(u.seconds for u in all_units), 0.0, []
    for unit in all_units:
        if min(int((done + unit.seconds / 2) * n / whole), n - 1) == i - 1:
            part.append(unit)
        done += unit.seconds
    return part


def unmatched() -> list[str]:
    """Excuses for commands that the documentation does not have."""
    said = {b.plain for page in pages() for b in blocks_of(page)}
    return [command for command in EXCUSED if command not in said]


class Shell:
    """bash, one command after the other; what goes on in the background is known by its process id."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.log = world.folder / ".log"
        self.log.touch()
        self.answers, answer = os.pipe()
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=world.folder, env=world.environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=self.log.open("w"), stderr=subprocess.STDOUT, pass_fds=[answer],
        )  # fmt: skip
        self.say = f">&{answer}"
        os.close(answer)
        self.background: list[tuple[str, str]] = []  # command, process id

    def run(self, block: Block) -> str | None:
        """What is wrong, if anything is."""
        text = block.text
        if block.kind == "python":
            text = f"python -c {shlex.quote(text)}"
        pattern, ready = next(((p, r) for p, r in ENDLESS if re.search(p, block.plain)), (None, ""))
        if pattern is None and not block.plain.endswith("&"):
            code = self.ask(f"{{ {text}\n}} < /dev/null\necho $? {self.say}")
            return None if code == "0" else f"exit code {code}" if code else f"no end after {TIMEOUT_S} s"
        self.end()
        pid = self.ask(f"touch .started; sleep .1; {{ {re.sub(r' *&$', '', block.plain)}\n}} < /dev/null &\necho $! {self.say}") or ""
        self.background.append((block.plain, pid))
        return self.wait(ready.format(port=_port(block.plain)), pid)

    def wait(self, ready: str, pid: str) -> str | None:
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            if self.ask(f"{{ {ready or 'true'}\n}} > /dev/null 2>&1\necho $? {self.say}") == "0":
                return None
            if self.ask(f"kill -0 {pid} 2> /dev/null; echo $? {self.say}") != "0":
                return f"ended with exit code {self.ask(f'wait {pid}; echo $? {self.say}')} before `{ready}` held"
            time.sleep(0.5)
        return f"`{ready}` did not hold after {TIMEOUT_S} s"

    def end(self) -> str | None:
        """End what goes on in the background, as an operator would. What did not end well."""
        wrong = None
        for command, pid in self.background:
            code = self.ask(f"kill {pid} 2> /dev/null; wait {pid}; echo $? {self.say}")
            if code not in ("0", "130", "143"):
                wrong = f"`{command}` ended with exit code {code} when it was asked to"
        self.background = []
        return wrong

    def ask(self, lines: str) -> str | None:
        """What the lines say; nothing after TIMEOUT_S."""
        assert self.process.stdin
        self.process.stdin.write(lines + "\n")
        self.process.stdin.flush()
        if select.select([self.answers], [], [], TIMEOUT_S)[0]:
            return os.read(self.answers, 100).decode().strip()
        return None

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.answers)


def _port(command: str) -> str:
    found = re.search(r"--port[ =](\d+)", command)
    return found[1] if found else next((port for word, port in PORTS.items() if word in command), "8000")


def catch_up(text: str, before: list[Block], shell: Shell, world: World) -> None:
    """Run what the page says before, in another part, and what is needed here: a file, a log, a run that the text names."""
    for at, block in enumerate(before):
        for path in writes(block.plain):
            known = any(re.fullmatch(pattern, path) for pattern, _ in RECIPES)
            named = mentioned(re.escape(path), text) or f"{Path(path).parent}/{{" in text
            if named and not known and not (world.folder / path).exists():
                catch_up(block.text, before[:at], shell, world)
                if wrong := check(block, shell, world):
                    print(f"       {block.where}, for what follows: {wrong}", flush=True)


def check(block: Block, shell: Shell, world: World) -> str | None:
    """What is wrong with a block."""
    if block.kind == "notebook":
        from documentation.notebooks import mistake  # of the extra docs, which nothing else here needs

        return mistake(ROOT / block.text, world.folder, world.environment)
    if block.kind == "yaml":
        try:
            fragments.check(block)
        except (DistmtlError, YAMLError) as e:
            return str(e)
        return None
    with world.ready_for(block.plain):
        return shell.run(block)


def main(argv: list[str]) -> int:
    chosen = everything = units()
    if argv and (found := re.fullmatch(r"(\d+)/(\d+)", argv[0])):
        chosen = part_of(chosen, int(found[1]), int(found[2]))
    elif argv:
        chosen = [u for u in chosen if any(u.page == str(Path(a)) for a in argv)]
    failed = [f"documentation/excused.py: no page says `{command}`" for command in unmatched()]
    print(f"{sum(len(u.blocks) for u in chosen)} blocks, about {sum(u.seconds for u in chosen)} s", flush=True)
    started = time.monotonic()
    world = World(FOLDER)
    print(f"world: {time.monotonic() - started:.0f} s", flush=True)
    excused = passed = 0
    page, before = "", list[Block]()
    for unit in chosen:
        if unit.page != page:
            page = unit.page
            before = [b for u in everything if u.page == page for b in u.blocks if b.line < unit.blocks[0].line]
            world.new_page()
        shell = Shell(world)
        for block in unit.blocks:
            if reason := EXCUSED.get(block.plain):
                excused += 1
                print(f"{'–':>6} {block.where}: {block.plain}  ({reason})", flush=True)
                continue
            start, said = time.monotonic(), shell.log.stat().st_size
            catch_up(block.text, before, shell, world)
            wrong = check(block, shell, world)
            if block is unit.blocks[-1]:
                wrong = wrong or shell.end()
            title = block.plain.splitlines()[0] if block.kind == "command" else block.kind
            print(f"{time.monotonic() - start:4.0f} s {block.where}: {title}", flush=True)
            if wrong:
                failed.append(f"{block.where}: {title}: {wrong}")
                tail = shell.log.read_bytes()[said:].decode(errors="replace").splitlines()[-40:]
                print("\n".join([f"FAILED: {wrong}", *(f"    {line}" for line in tail)]), flush=True)
            passed += not wrong
        shell.close()
    print("\n".join([f"\n{time.monotonic() - started:.0f} s; {excused} excused", *failed, f"{passed} passed, {len(failed)} failed"]))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
