"""A flag that names a place belongs to the command that defines it."""

from absl import flags

from terdit_jax.paths import define_path


def test_helpshort_of_a_command_lists_its_path_flags():
    values = flags.FlagValues()
    define_path("place", None, "Where.", flag_values=values)
    assert list(values.key_flags_by_module_dict()) == [__name__]
