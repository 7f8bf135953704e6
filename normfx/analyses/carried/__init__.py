"""Carried: operators that are linear in an operand and keep its blocks apart.

If one number is added to all of a block of the operand, then some number is added to all of the
block of the result that it becomes; and where every block of the operands has mean zero, so has
that of the result. Each law says which block becomes which, in both directions, for one operator:

    add            a sum of operands that are carried, broadcast only along free dims
    mul, div       times a factor that is one number for each block
    views, slices  the same numbers elsewhere; of a block that is cut in two nothing is known
    linear, conv   linear in the weight and the bias: the outputs are a dim of both
    matmul         linear in the second factor, whose rows are mixed: A (B + s 1^T) = AB + (As) 1^T
    embedding      rows of a table
    mean, pooling  over dims that no block runs along
    where          of a condition that is one for each block

A constant factor for each channel (LayerScale, 2103.17239, 2) is carried where the operator before
it is linear in a weight: the factor goes into that first,  g * (Wx + c) = (diag(g) W) x + g * c.
"""

from normfx.analyses.carried.law import FLOATS as FLOATS
from normfx.analyses.carried.law import Carried as Carried
from normfx.analyses.carried.law import Use as Use
from normfx.analyses.carried.table import carried as carried
from normfx.analyses.carried.table import reads_numbers as reads_numbers
