"""Follow one warp through a kernel's PTX, to learn which addresses it reads and writes.

Only what addresses and branches depend on is computed, which is integers. All else (numbers,
whatever was loaded or came from shared memory) is unknown, and an error where it decides either.
"""

import functools
import operator
import re
from dataclasses import dataclass

import numpy as np

LANES = 32
_STATEMENT = re.compile(r"^\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.]*)\s*(.*?);", re.MULTILINE)
_LABEL = re.compile(r"^(\$\w+):", re.MULTILINE)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ACCESS = re.compile(r"(ld|st)\.(?:volatile\.)?global")


@dataclass
class Access:
    """One execution of one global load or store; of no lane, where all are masked."""

    line: int  # statement of the kernel
    store: bool
    size: int  # bytes of a lane
    addresses: np.ndarray  # of the lanes that take part

    @property
    def sectors(self) -> np.ndarray:
        """The 32-byte parts of memory that the warp touches, by number."""
        ends = np.concatenate([self.addresses, self.addresses + self.size - 1])
        return np.unique(ends // 32)

    @property
    def least(self) -> int:
        """As few sectors as would hold what its lanes ask for; lanes may ask for the same."""
        return -(-len(np.unique(self.addresses)) * self.size // 32)


@functools.lru_cache(maxsize=4)  # a kernel is followed several times in a row
def _parsed(ptx):
    """Return statements, as (not, guard, name, operands), and where labels point."""
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    marks = [(m.start(), m) for m in _STATEMENT.finditer(body)]
    marks += [(m.start(), m) for m in _LABEL.finditer(body)]
    statements, labels = [], {}
    for _, match in sorted(marks, key=lambda mark: mark[0]):
        if match.re is _LABEL:
            labels[match[1]] = len(statements)
        elif not match[3].startswith((".", "reg", "loc")):
            negated, guard, name, operands = match.groups()
            statements.append((negated, guard, name, _OPERAND.findall(operands)))
    return statements, labels


def barriers(ptx: str) -> int:
    """How many barriers a kernel's innermost loops have.

    Where the compiler passes values between the lanes through shared memory, there are two each.
    """
    statements, labels = _parsed(ptx)
    loops = [
        (labels[operands[0]], n)
        for n, (_, _, name, operands) in enumerate(statements)
        if name.startswith("bra") and labels[operands[0]] <= n
    ]
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    return sum(name.startswith("bar.sync") for a, b in inner for _, _, name, _ in statements[a:b])


def follow(ptx, parameters, grid, program, warp, limit=10**6) -> list[Access]:
    """Return all accesses of a warp.

    Args:
        ptx (str): Of one kernel.
        parameters (list[int]): Of the kernel, an address for each tensor. What Triton adds is 0.
        grid, program (tuple[int, int, int]): Size of the grid, and position in it.
        warp (int): Of the program.
        limit (int): Most statements.

    Raises:
        ValueError: An address or branch depends on what is not computed here.
    """
    statements, labels = _parsed(ptx)
    run = _Warp(parameters, grid, program, warp)
    at = executed = 0
    while at < len(statements):
        executed += 1
        if executed > limit:
            raise ValueError(f"more than {limit} statements")
        negated, guard, name, operands = statements[at]
        lanes = None
        if guard:
            lanes = run.values.get(guard)
            if lanes is not None and negated:
                lanes = ~lanes
        if name.startswith("bra"):
            if guard and (lanes is None or lanes.any() != lanes.all()):
                raise ValueError(f"statement {at}: a branch that is not known or not uniform")
            taken = not guard or lanes.all()
            at = labels[operands[0]] if taken else at + 1
            continue
        if name in ("ret", "exit") and (not guard or lanes.all()):
            break
        run.execute(at, name, operands, guard is not None, lanes)
        at += 1
    return run.accesses


_COMPARISONS = {
    **dict(lt=operator.lt, le=operator.le, gt=operator.gt, ge=operator.ge),
    **dict(eq=operator.eq, ne=operator.ne, lo=operator.lt, ls=operator.le, hi=operator.gt),
    "hs": operator.ge,
}
_OPERATIONS = {
    **dict(add=operator.add, sub=operator.sub, mul=operator.mul),
    **{"and": operator.and_, "or": operator.or_, "xor": operator.xor},
    **dict(min=np.minimum, max=np.maximum, shl=operator.lshift, shr=operator.rshift),
    "neg": operator.neg,
    "abs": np.abs,
    # Towards zero.
    "div": lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)),
    "rem": lambda a, b: np.sign(a) * (np.abs(a) % np.abs(b)),
}


class _Warp:
    """Registers of a warp, one number per lane; missing ones are unknown."""

    def __init__(self, parameters, grid, program, warp):
        self.parameters = parameters
        self.accesses: list[Access] = []
        self.values = {}
        for axis, size, number in zip("xyz", grid, program, strict=True):
            self.values[f"%nctaid.{axis}"] = self.fill(size)
            self.values[f"%ctaid.{axis}"] = self.fill(number)
        self.values["%tid.x"] = warp * LANES + np.arange(LANES)

    @staticmethod
    def fill(number: int) -> np.ndarray:
        return np.full(LANES, number)

    def read(self, operand: str) -> np.ndarray | None:
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
            return self.fill(int(operand, 0))
        return self.values.get(operand)

    def execute(self, line, name, operands, guarded, lanes) -> None:
        access = _ACCESS.match(name)
        if access:
            self.access(line, access[1] == "st", name, operands, guarded, lanes)
        elif name.startswith(("cp.async.bulk", "cp.async.c", "atom.global", "red.global")):
            raise ValueError(f"statement {line}: {name} is not counted here")
        if not operands or name.startswith(("st.", "bar")):
            return
        whole = not access and not operands[0].startswith("{")
        result = self.compute(name, operands) if whole else None
        for register in re.findall(r"%\w+", operands[0]):
            if guarded and result is not None:
                old = self.values.get(register)
                known = lanes is not None and (old is not None or lanes.all())
                value = np.where(lanes, result, old) if known else None
            else:
                value = result
            if value is None:
                self.values.pop(register, None)
            else:
                self.values[register] = value

    def access(self, line, store, name, operands, guarded, lanes) -> None:
        place = next(operand for operand in operands if operand.startswith("["))
        register, _, offset = place.strip("[]").replace(" ", "").partition("+")
        base = self.read(register)
        if base is None:
            raise ValueError(f"statement {line}: the address of {name} is not known")
        times = int((re.search(r"\.v(\d)", name) or [0, 1])[1])
        size = times * int(re.search(r"\.[bfsu](\d+)$", name)[1]) // 8
        active = base if lanes is None else base[lanes]  # all, where it is not known which
        self.accesses.append(Access(line, store, size, active + int(offset or 0, 0)))

    def compute(self, name, operands):
        """Value of a statement; None where it is not one of integers, or of unknown ones."""
        head, *kinds = name.split(".")
        kind = kinds[-1]
        if name.startswith("ld.param"):
            number = int(re.search(r"param_(\d+)", operands[1])[1])
            known = number < len(self.parameters)
            return self.fill(self.parameters[number] if known else 0)
        if (kind[0] == "f" and head != "selp") or "bf16" in name or len(operands) < 2:
            return None
        sources = [self.read(operand) for operand in operands[1:]]
        if any(source is None for source in sources):
            return None
        if head in ("mov", "cvta"):
            return sources[0].astype(bool) if kind == "pred" else sources[0]
        if name.startswith("shfl.sync.idx"):
            return sources[0][sources[1] % LANES]
        if kind == "pred":
            return ~sources[0] if head == "not" else _OPERATIONS[head](*sources).astype(bool)
        if head == "selp":
            return np.where(sources[2], *sources[:2])
        bits = int(re.search(r"\d+$", kind)[0]) if re.search(r"\d+$", kind) else 32
        if head == "cvt":  # to the first type, from the second
            return self.wrap(self.cast(sources[0], kind), kinds[-2])
        added = sources[2] if head == "mad" else 0  # of the result's type
        sources = [self.cast(source, kind) for source in sources]
        if head == "setp":
            return _COMPARISONS[kinds[0]](*sources)
        if head == "not":
            return self.wrap(~sources[0], kind)
        if head == "bfe":
            value = sources[0] >> sources[1] & ((1 << sources[2]) - 1)
            sign = 1 << (sources[2] - 1)
            return value - 2 * (value & sign) if kind[0] == "s" else value
        if head in ("mul", "mad"):
            product = sources[0] * sources[1]
            if kinds[0] == "hi":  # of 32 bits: 64 hold the product
                product = product >> bits
            wide = kind[0] + str(2 * bits) if kinds[0] == "wide" else kind
            return self.wrap(product + added, wide)
        if head in _OPERATIONS:
            return self.wrap(_OPERATIONS[head](*sources), kind)
        return None

    @staticmethod
    def cast(value, kind):
        """The bits of a number read as such a type; 64 bits are always signed here."""
        bits = int(kind[1:])
        if kind[0] == "u" and bits < 64:
            return value & ((1 << bits) - 1)
        return _Warp.wrap(value, kind)

    @staticmethod
    def wrap(value, kind):
        """The lowest bits of a number, signed."""
        bits = int(kind[1:])
        if bits >= 64:
            return value
        half = 1 << (bits - 1)
        return ((value + half) & ((1 << bits) - 1)) - half
