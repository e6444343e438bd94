// The inner loops for one instruction set; UBGEN_ISA names it.
#include "group_norm_silu.h"
#include "guided_step.h"
#include "quantise.h"
#include "resize.h"

#define UBGEN_NAME_OF(isa) #isa
#define UBGEN_NAME(isa) UBGEN_NAME_OF(isa)

namespace ubgen {
namespace UBGEN_ISA {

extern const Inner table;
const Inner table = {UBGEN_NAME(UBGEN_ISA), guided_step, quantise,  resize,          resize_scratch,
                     sums,                  column_sums, norm_silu, column_norm_silu};

}  // namespace UBGEN_ISA
}  // namespace ubgen
