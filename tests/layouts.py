"""How hypothesis draws an adapter layout: `st.from_type(AdapterLayout)`."""

from hypothesis import strategies as st

from fedapt.protocols.layout import A_SUFFIX, B_SUFFIX, AdapterLayout, TensorSpec

names = st.text("abcdefgh.0_", min_size=1, max_size=12)
dims = st.integers(0, 5)


@st.composite
def layouts(draw: st.DrawFn) -> AdapterLayout:
    """Whole and halved factor pairs, scalars, vectors, matrices and stacks of them; any axis may be empty."""
    tensors = {}
    for module in draw(st.sets(names, max_size=3)):
        rank, inputs, outputs = draw(dims), draw(dims), draw(dims)
        halves = draw(st.sampled_from(["ab", "ab", "a", "b"]))
        if "a" in halves:
            tensors[module + A_SUFFIX] = TensorSpec(module + A_SUFFIX, (rank, inputs), "A")
        if "b" in halves:
            tensors[module + B_SUFFIX] = TensorSpec(module + B_SUFFIX, (outputs, rank), "B")
    for name, shape in draw(st.dictionaries(names, st.lists(dims, max_size=3), max_size=4)).items():
        tensors[name] = TensorSpec(name, tuple(shape), "other")
    return AdapterLayout(draw(st.permutations(list(tensors.values()))))
