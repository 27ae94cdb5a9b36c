// Nothing of this CUTLASS header is emulated, and g++ refuses it.
#pragma once
