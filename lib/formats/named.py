"""The formats that have names."""

from .bitmod import BITMOD3, BITMOD4, Mixture
from .codebook import NF4, Codebook
from .dynamic import Dynamic, PositiveDynamic
from .element import Dependent
from .format import Format
from .integer import Bipolar, Integer, Ternary
from .minifloat import Minifloat
from .minmax import ternary_minmax
from .olive import OutlierVictim, Pairs, SigmaSearch
from .scales import AbsMax, AbsMean, Asymmetric, MeanMagnitude, PowerOfTwo, TwoLevel
from .segmented import Segmented

_int = {n: Integer(f"int{n}", n, True) for n in range(2, 9)}
_uint = {n: Integer(f"uint{n}", n, False) for n in range(2, 9)}
_bipolar = {n: Bipolar(f"bipolar{n}", n, True) for n in range(1, 9)}
fp4_e2m1, fp6_e2m3, fp6_e3m2 = Minifloat.of(2, 1), Minifloat.of(2, 3), Minifloat.of(3, 2)
fp8_e4m3, fp8_e5m2 = Minifloat.of(4, 3, reserved=1), Minifloat.of(5, 2, reserved=4)
ufp8_e4m3 = Minifloat.of(4, 3, reserved=1, signed=False)  # scales: 8 bits are stored, the sign's is 0
nf4 = Codebook.of("nf4", NF4)
_dynamic8 = Dynamic("dynamic8", 8, signed=True)

dynamic8 = Format("dynamic8", _dynamic8)
udynamic8 = Format("udynamic8", Dynamic("udynamic8", 8, signed=False))
udynamic8_positive = Format("udynamic8_positive", PositiveDynamic("udynamic8_positive", 8, signed=False))
ufp8_e4m4 = Format("ufp8_e4m4", Segmented("ufp8_e4m4", 8, signed=False))

_FORMATS = (
    Format("int1", _bipolar[1], MeanMagnitude()),  # symmetric in one bit: -1 and 1
    *(Format(f"int{n}", element, AbsMax(beyond=0.5)) for n, element in _int.items() if n < 8),
    Format("int8", _int[8]),  # what was int8 before is the same int8 when it is rounded again
    *(Format(f"uint{n}", element, Asymmetric()) for n, element in _uint.items()),
    *(Format(f"bipolar{n}", e, MeanMagnitude() if n == 1 else AbsMax()) for n, e in _bipolar.items()),
    Format("ternary", Ternary("ternary", 2, True), AbsMean()),
    ternary_minmax,
    *(Format(e.name, e) for e in (fp4_e2m1, fp6_e2m3, fp6_e3m2, fp8_e4m3, fp8_e5m2)),
    Format("nf4", nf4, group_size=64),
    Format("nf4_dq", nf4, TwoLevel(_dynamic8, block=256, centred=True), 64),
    Format("mxfp4", fp4_e2m1, PowerOfTwo(), 32),
    Format("mxfp6", fp6_e2m3, PowerOfTwo(), 32),
    Format("mxfp6_e3m2", fp6_e3m2, PowerOfTwo(), 32),
    Format("mxfp8", fp8_e4m3, PowerOfTwo(), 32),
    Format("mxfp8_e5m2", fp8_e5m2, PowerOfTwo(), 32),
    Format("mxint8", _int[8], PowerOfTwo(), 32),
    Format("nvfp4", fp4_e2m1, TwoLevel(ufp8_e4m3), 16),
    *(Format(f"bfp{n}", _int[n], PowerOfTwo(), 16) for n in (4, 6, 8)),
    *(
        Mixture(
            f"bitmod{n}", Dependent(f"bitmod{n}", n, True), TwoLevel(_uint[8], by_column=True), 128, elements
        )
        for n, elements in ((3, BITMOD3), (4, BITMOD4))
    ),
    Pairs("olive4", OutlierVictim("olive4", 4, True), SigmaSearch(beyond=0.5)),
    Pairs("olive8", OutlierVictim("olive8", 8, True), SigmaSearch()),
    *(dynamic8, udynamic8, udynamic8_positive, ufp8_e4m4),
    Format("mulaw8", Segmented("mulaw8", 8, signed=True)),
)
BY_NAME = {format.name: format for format in _FORMATS}
