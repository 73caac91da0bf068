"""A flag that names a place belongs to the command that defines it."""

from absl import flags

from terdit_jax.paths import define_path


def test_it_is_defined_by_the_module_that_asks_for_it():
    values = flags.FlagValues()
    define_path("place", None, "Where.", flag_values=values)
    assert list(values.flags_by_module_dict()) == [__name__]
