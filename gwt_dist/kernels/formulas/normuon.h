// Momentum that travels to be orthogonalized and evened out by rows: on units and elements it is `orthogonal`.

#pragma once

#include "orthogonal.h"
